"""Files of images and captions as samples: webdataset shards, folders, CSV, classes, retrieval pairs.

Read `data.py` first, then `shards.py`. No model, no graph.
"""
