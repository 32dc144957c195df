"""The front door: gRPC services, tokenisation, and the dispatcher that runs requests on workers."""
