"""Documents published about the server, generated from the wire types and the table of operations."""
