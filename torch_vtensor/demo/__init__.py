"""The demo, one idea a file: `story` tells it from start to end; `text`, `train`, `compare`, `picture` do the work."""
