"""Export a run, or any checkpoint of any strategy, without the GPUs it was trained on.

Command:   python pipelines/export.py RUN OUT [format=timm|transformers|onnx|state_dict|vit_mae|official] [license=NAME]
           python pipelines/export.py RUN/checkpoints/step_00001234 OUT
Expected:  OUT: the encoder as a folder for timm, or of transformers' own ViTModel, DeiTModel, BeitModel or SwinModel; a
           whole MAE as ViTMAEForPreTraining; ONNX; or one safetensors file. Each is loaded in a process without ssl_vit
           and compared (1e-5 of the largest value) before it gets its name, and has a model card.
"""

from ssl_vit.export.command import export_main

if __name__ == "__main__":
    export_main()
