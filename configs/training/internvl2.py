"""A fine-tune of InternVL2 for xtuner 0.2.0.

The first part has the settings; a job's values are put in their place, everything below follows from
them. As it stands here it is the tutorial's recipe for InternVL2-2B, and runs by itself:

    python -m xtuner.tools.train internvl2.py --deepspeed deepspeed_zero2
"""

from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.engine.runner import TrainLoop
from xtuner.model import InternVL_V1_5
from xtuner.utils import PROMPT_TEMPLATE

# --- settings ------------------------------------------------------------------------------------

model_path = "OpenGVLab/InternVL2-2B"
data_path = "train.json"
image_folder = "images"
language = "internlm2"  # or phi3

tuned = ["llm"]  # of llm and vit; the projector is always trained
method = "lora"  # or qlora, full
lora_rank = 128
lora_alpha = 256
lora_dropout = 0.05
# Named one by one: left to xtuner, LoRA would also go on the head.
llm_targets = ["wqkv", "wo", "w1", "w2", "w3"]
vit_targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]

max_length = 8192
batch_size = 4  # per GPU and iteration
accumulative_counts = 2
num_workers = 4
max_epochs = 10
lr = 3e-5
weight_decay = 0.05
warmup_iterations = 0
total_iterations = 1000
save_iterations = 64
keep_checkpoints = 3
log_iterations = 10
seed = 0
backend = "nccl"

# --- model ---------------------------------------------------------------------------------------

model = dict(
    type=InternVL_V1_5,
    model_path=model_path,
    freeze_llm=method != "full" or "llm" not in tuned,
    freeze_visual_encoder=method != "full" or "vit" not in tuned,
    quantization_llm=method == "qlora" and "llm" in tuned,
    quantization_vit=method == "qlora" and "vit" in tuned,
)
if method != "full" and "llm" in tuned:
    model["llm_lora"] = dict(
        type=LoraConfig,
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=llm_targets,
        task_type="CAUSAL_LM",
    )
if method != "full" and "vit" in tuned:
    model["visual_encoder_lora"] = dict(
        type=LoraConfig,
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=vit_targets,
    )

# --- data ----------------------------------------------------------------------------------------

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    dataset=dict(
        type=InternVL_V1_5_Dataset,
        model_path=model_path,
        template=PROMPT_TEMPLATE.phi3_chat
        if language == "phi3"
        else PROMPT_TEMPLATE.internlm2_chat,
        data_paths=data_path,
        image_folders=image_folder,
        max_length=max_length,
    ),
    sampler=dict(
        type=LengthGroupedSampler,
        length_property="modality_length",
        per_device_batch_size=batch_size * accumulative_counts,
    ),
    collate_fn=dict(type=default_collate_fn),
)

# --- optimizer and schedule ----------------------------------------------------------------------

optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale="dynamic",
    dtype="float16",
)
# Counted in iterations, not as shares of an epoch: a share that rounds down to nothing is an error
# in mmengine, and one of a single iteration leaves the learning rate where it starts.
param_scheduler = [
    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        by_epoch=False,
        begin=warmup_iterations,
        end=total_iterations,
        T_max=total_iterations - warmup_iterations,
    )
]
if warmup_iterations > 1:
    param_scheduler.insert(
        0,
        dict(type=LinearLR, start_factor=1e-5, by_epoch=False, begin=0, end=warmup_iterations),
    )
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)

# --- running -------------------------------------------------------------------------------------

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=log_iterations),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=CheckpointHook,
        by_epoch=False,
        interval=save_iterations,
        save_optimizer=True,
        max_keep_ckpts=keep_checkpoints,
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend=backend),
)
log_processor = dict(by_epoch=False, window_size=log_iterations)
randomness = dict(seed=seed, deterministic=False)
log_level = "INFO"
visualizer = None
load_from = None
resume = False
