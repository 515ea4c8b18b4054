"""Pack images into shards: a folder, a Hugging Face dataset or the built-in digits. No GPU.

Command:   python pipelines/pack.py /my/images /my/shards            (--help lists all keys)
Expected:  /my/shards/ with shard-000000.tar ..., index.json and refused.jsonl (broken images, by name), and a summary:
           images found, packed and refused, classes, modes. Exit code 2 if nothing or too little could be packed.
"""

from ssl_vit.data.commands import pack_main

if __name__ == "__main__":
    pack_main()
