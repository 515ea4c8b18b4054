"""Pack images into shards: a folder, a list of files, a Hugging Face dataset, other shards. No GPU.

Command:   python pipelines/pack.py /my/images /my/shards            (--help lists all keys)
           python pipelines/pack.py /my/images /my/shards part=3/8     on eight machines; the last joins the parts
Expected:  /my/shards/ with shard-000000.tar ..., index.json and refused.jsonl (broken images, by name), and a summary:
           images found, packed and refused, classes, modes, sizes. Exit code 2 if nothing or too little could be
           packed. Killed, the same command goes on after the last finished shard.
"""

from ssl_vit.data.commands import pack_main

if __name__ == "__main__":
    pack_main()
