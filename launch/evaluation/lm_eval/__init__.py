"""Two tasks for lm-eval, which run offline on an exported model; `lm_eval --include_path` takes this folder."""
