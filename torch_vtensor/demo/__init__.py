"""The demo, one idea a file: `story` tells it from start to end; the others do the work."""
