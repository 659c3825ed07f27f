"""Models as directories that Hugging Face tools open: written from a prepared model, and read into one.

`saving.py` and `loading.py` are where to begin reading.
"""
