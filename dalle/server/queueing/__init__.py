"""Jobs, the queue, and the engine that draws them; no HTTP."""
