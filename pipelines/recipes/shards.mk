# Both caches in N parts at once, then merged: make -f shards.mk -j 4 SHARDS=4
#
# Each part encodes the samples whose keys fall to it, into a folder of its own, without talking to the others: so the
# parts can as well run on several machines that share a disk (slurm/ does that), or one after the other. A part that
# was interrupted goes on where it stopped; a part that is whole has nothing to do. On one machine it helps where an
# encoder leaves cores or GPUs idle: give each part its own with LAUNCH, which may use $(part).
#
#   make -f shards.mk -j 8 SHARDS=8 LAUNCH='CUDA_VISIBLE_DEVICES=$(part)' DATA='--dataset data.toml' ...
#
# `list` prints the parts as commands instead, one a line, for GNU parallel on this machine or several; `merge` puts
# together what they made. `parallel` does both.
#
#   make -f shards.mk list SHARDS=8 ... >work.list
#   parallel --joblog work.log --resume-failed --sshlogin a,b,c --workdir . <work.list
#   make -f shards.mk merge SHARDS=8 ...
.DELETE_ON_ERROR:
.SECONDARY:

BIN            ?= $(patsubst %/,%,$(dir $(shell command -v flux-cache)))
SHARDS         ?= 2
WORK           ?= work
DATA           ?= --images images
AE             ?= models/ae.safetensors
CLIP           ?= models/clip.safetensors
T5             ?= models/t5.safetensors
T5_TOKENIZER   ?= models/tokenizers/t5/spiece.model
CLIP_TOKENIZER ?= models/tokenizers/clip
LATENTS_FLAGS  ?= --resolution 1024x1024
TEXT_FLAGS     ?=
LAUNCH         ?=
PARALLEL_FLAGS ?= --jobs 2

PARTS := $(shell seq 0 $$(($(SHARDS) - 1)))
# the part's number, from the target's folder: .../latents.3-of-8/manifest.json
part = $(subst -of-$(SHARDS),,$(patsubst .%,%,$(suffix $(patsubst %/,%,$(dir $@)))))
# and that folder
folder = $(patsubst .list.%,%,$(patsubst %/,%,$(dir $@)))

.PHONY: all list merge parallel FORCE
all: $(WORK)/latents/manifest.json $(WORK)/text/manifest.json

cache-latents = $(LAUNCH) $(BIN)/flux-cache-latents $(DATA) --ae $(AE) $(LATENTS_FLAGS) --shard $(part)/$(SHARDS) --out $(folder)
cache-text = $(LAUNCH) $(BIN)/flux-cache-text $(DATA) --clip $(CLIP) --t5 $(T5) --clip-tokenizer $(CLIP_TOKENIZER) \
  --t5-tokenizer $(T5_TOKENIZER) $(TEXT_FLAGS) --shard $(part)/$(SHARDS) --out $(folder)

# Always asked: a part without work leaves its manifest, and so the merge, alone.
LATENTS := $(PARTS:%=$(WORK)/latents.%-of-$(SHARDS)/manifest.json)
TEXT := $(PARTS:%=$(WORK)/text.%-of-$(SHARDS)/manifest.json)
$(LATENTS): FORCE
	$(cache-latents)
$(TEXT): FORCE
	$(cache-text)
FORCE:

$(WORK)/latents/manifest.json: $(LATENTS)
	$(BIN)/flux-cache merge $(^D) --out $(@D)
$(WORK)/text/manifest.json: $(TEXT)
	$(BIN)/flux-cache merge $(^D) --out $(@D)

# The same commands, printed by targets of another name.
LISTED := $(LATENTS:%=.list.%) $(TEXT:%=.list.%)
.PHONY: $(LISTED)
list: $(LISTED)
$(LATENTS:%=.list.%):
	@printf '%s\n' '$(subst ','\'',$(cache-latents))'
$(TEXT:%=.list.%):
	@printf '%s\n' '$(subst ','\'',$(cache-text))'

merge:
	$(BIN)/flux-cache merge $(dir $(LATENTS)) --out $(WORK)/latents
	$(BIN)/flux-cache merge $(dir $(TEXT)) --out $(WORK)/text

parallel:
	@mkdir -p $(WORK)
	$(MAKE) --no-print-directory -s -f $(firstword $(MAKEFILE_LIST)) list >$(WORK)/work.list
	parallel --will-cite --joblog $(WORK)/work.log $(PARALLEL_FLAGS) <$(WORK)/work.list
	$(MAKE) --no-print-directory -f $(firstword $(MAKEFILE_LIST)) merge
