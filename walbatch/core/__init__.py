"""The pure core: facts and `now_ns` in, decisions out. No files, clocks, threads or chance."""
