"""The sandbox of the `code` verifier: programs run apart from their tests, in namespaces of their own."""
