"""Index a folder of tar shards (webdataset layout) made by anybody, so that any sample can be read directly. No GPU.

Command:   python pipelines/index.py /my/shards                      (or a URL; --help lists all keys)
Expected:  index.json and index.samples.npy beside the shards (of a URL: in the cache, or in out=FOLDER), the number of
           samples and labels, and whether classes are mixed or sorted. Exit code 2 with shard, member and cure if a
           shard is damaged or would be read wrongly.
"""

from ssl_vit.data.commands import index_main

if __name__ == "__main__":
    index_main()
