"""One decoding engine: proposers draft, the model scores, a verifier keeps, the cache commits."""
