"""Training of dictionaries: what is learnt, from which rows, and how a killed run goes on bit for bit.

| module | idea |
|---|---|
| `config` | every number that changes the result |
| `layout` | which columns of a row a group of features reads and writes |
| `codes` | sparse and dense activations, and the three products that training needs of them |
| `selection` | which features are active |
| `sparse_step` | loss and gradients of one batch, written by hand |
| `adam` | Adam on blocks of rows, with the decoder's norm kept |
| `schedule` | learning rate and sparsity over the steps |
| `buffer` | rows in random order |
| `shards`, `harvest`, `corpus` | rows from a model that reads text, cached on disk |
| `checkpoint` | directories and a pointer that moves at once |
| `parallel` | several processes under torchrun |
| `trainer` | the loop |
| `finish` | the trained weights as a dictionary at the stream's own scale |
"""
