"""Folders in the Hugging Face Hub's layout, from which PyTorch users sample without this package: written and read.

config.json           architecture, as the PyTorch twin's constructor takes it, with `model_type` and `architectures`
model.safetensors     weights under the twin's names; above 5 GB in shards with an index
modeling_NAME.py      the twin, a copy of `systems/NAME/modeling_NAME.py`
pipeline.py           prompts to images
text_encoder/         the CLIP text tower, as transformers has it; absent where the generator takes no text features
tokenizer/            its tokenizer
experiment.json       the whole configuration of the run, for the way back
training.json         step, kind of weights and resolution of the checkpoint
README.md             the model card

`folder.py` writes and reads the whole, `twin_map.py` translates weights, `model_card.py` writes the card, `remote.py`
downloads and uploads. `layout.py` has what needs no JAX. `pipeline.py` is a data file, which this package never
imports.
"""
