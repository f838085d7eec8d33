"""The HTTP front end: validate, record, enqueue, read back, stream. Knows no engine."""
