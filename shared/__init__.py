"""What every program of vlmq shares: records, stores, the queue; never Flask, never an engine."""
