"""Speed and memory of this project beside what one would use instead, measured in the same run.

python -m bench train|probe|scale|start|data|gpu [--device cpu|cuda] [--size tiny|default|venhoff]
    [--json FILE]

Models have random weights of true size, built on the spot: speed does not depend on the values. Contenders
take turns (A B C A B C ...), so that a machine that slows down slows all of them; a ratio is taken within
each round, and the median over rounds is reported with the lowest and the highest.
"""
