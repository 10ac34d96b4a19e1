"""The caller's process: one core without I/O, a blocking shell (`sync`) and an asyncio one (`aio`)."""
