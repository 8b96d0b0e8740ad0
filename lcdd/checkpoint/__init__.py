"""What a run leaves behind, whole or not at all: directories, fingerprints, state, log, lock, signals."""

from lcdd.checkpoint.directory import (
    MANIFEST,
    SEAL,
    complete_checkpoints,
    file_sha256,
    path_sha256,
    read_manifest,
    require_new_directory,
    verify_directory,
    write_directory,
    write_json,
    write_manifest,
)
from lcdd.checkpoint.fingerprints import model_fingerprint, template_fingerprint, tokenizer_fingerprint
from lcdd.checkpoint.hub import hub_name, local_directory, model_card, push_directory
from lcdd.checkpoint.identity import RESULTS, run_directory, run_identity, versions
from lcdd.checkpoint.lock import only_writer
from lcdd.checkpoint.log import RunLog, finite_or_null, read_log
from lcdd.checkpoint.signals import termination
from lcdd.checkpoint.store import CheckpointStore, differences, random_state, set_random_state

__all__ = [
    "MANIFEST",
    "RESULTS",
    "SEAL",
    "CheckpointStore",
    "RunLog",
    "complete_checkpoints",
    "differences",
    "file_sha256",
    "finite_or_null",
    "hub_name",
    "local_directory",
    "model_card",
    "model_fingerprint",
    "only_writer",
    "path_sha256",
    "push_directory",
    "random_state",
    "read_log",
    "read_manifest",
    "require_new_directory",
    "run_directory",
    "run_identity",
    "set_random_state",
    "template_fingerprint",
    "termination",
    "tokenizer_fingerprint",
    "verify_directory",
    "versions",
    "write_directory",
    "write_json",
    "write_manifest",
]
