"""Client CPU: the SDK beside other clients, on one server."""
