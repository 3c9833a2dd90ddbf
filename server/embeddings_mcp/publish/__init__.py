"""What is published about the server: made from the wire types and the table of operations, never written by hand."""
