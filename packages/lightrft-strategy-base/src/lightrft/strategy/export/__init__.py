"""Models as directories that Hugging Face tools open: written from a prepared model, read into one, or converted.

Begin with `save_model.py`, `load_model.py` or `convert_checkpoint.py`.
"""
