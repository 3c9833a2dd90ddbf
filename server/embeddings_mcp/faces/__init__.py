"""The ways in: each translates one wire form to a request of the service and its answer back, and knows no more."""
