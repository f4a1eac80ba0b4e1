import hashlib
from polm.data.fingerprint import fingerprint_bytes
def test_fp(artifact, tmp_path):
    for n in ("pretrain","midtrain","sft"):
        p=artifact(n)/"model"/"model.safetensors"
        print(n, fingerprint_bytes(p)[:10])
    print(artifact.inputs("ppo")); print(artifact.spec("ppo")[1])
    changes = {"updates": 3, "prompts_per_rollout": 8, "minibatches": 1, "kl_beta": 0.0, "kl_target": None}
    settings = artifact.spec("ppo")[1].model_copy(update={**changes, "whiten_rewards": False})
    artifact.run("ppo", settings, artifact.inputs("ppo"), tmp_path / "out")
    print((tmp_path/"out"/"metrics.jsonl").read_text())
    print((tmp_path/"out"/"samples.jsonl").read_text()[:600])
