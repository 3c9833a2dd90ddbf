"""The interfaces: each only translates between one wire format and the requests and answers of the service."""
