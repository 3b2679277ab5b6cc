"""The server: an HTTP front and an engine process, and what passes between them."""
