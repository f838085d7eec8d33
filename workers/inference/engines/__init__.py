"""Engines: one process per replica behind a Unix socket; see ``base`` for the contract."""
