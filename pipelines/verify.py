"""Check a folder of shards: checksums, counts, agreement with the index, and that every image decodes. No GPU.

Command:   python pipelines/verify.py /my/shards                     (or a URL; --help lists all keys)
Expected:  one line for each bad shard or image, by shard and key, and exit code 2; or that all is good, and 0.
"""

from ssl_vit.data.commands import verify_main

if __name__ == "__main__":
    verify_main()
