"""One module an isolation level; each turns an instance into what the keeper shall spawn."""
