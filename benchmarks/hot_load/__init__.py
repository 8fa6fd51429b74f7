"""New weights under load: every answer is judged by the versions that it names."""
