"""The interfaces: each only translates between one wire format and the requests and responses of the service."""
