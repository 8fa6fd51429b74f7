"""Everything at once on one server: streams, clients that leave, malformed requests, new weights."""
