"""Fine-tune Chroma 1 by LoRA or at full rank.

config -> sources -scan-> Sample -assign-> Placed -fill-> caches -BatchOrder-> Batch
       -draw-> Noised -predict-> velocity -loss-> backward -optimizer-> TrainState
       -every-> checkpoint | validation images | held-out loss -emit-> events.jsonl
"""

__version__ = "0.2.0"
