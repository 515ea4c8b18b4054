"""Export the encoder of a run, or of any checkpoint of any strategy, without the GPUs it was trained on.

Command:   python pipelines/export.py RUN OUT [format=timm|state_dict]
           python pipelines/export.py RUN/checkpoints/step_00001234 OUT
Expected:  OUT, a folder that timm loads (its features compared before it gets its name), or one safetensors file.
"""

from ssl_vit.export.command import export_main

if __name__ == "__main__":
    export_main()
