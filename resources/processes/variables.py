"""The environment variables of a process that we start: those that it needs, and no passwords.

The environment of this program holds cloud keys, tokens and passwords of databases. Served models, children that read
foreign checkpoints, and tools have no use for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

#: For any program: the places of programs, files and libraries, and the form of text.
PROGRAM = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LANGUAGE", "LC_*", "TERM", "NO_COLOR"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_*", "XDG_*", "VIRTUAL_ENV"),
)
#: For programs that compute: devices, threads, compilers and the settings of numerical libraries.
COMPUTE = (
    *("CUDA_*", "NVIDIA_*", "NCCL_*", "CUDNN_*", "CUBLAS_*", "TENSORRT_*", "TRT_*", "ORT_*", "OV_*", "OPENVINO_*"),
    *("OMP_*", "GOMP_*", "KMP_*", "MKL_*", "DNNL_*", "ONEDNN_*", "OPENBLAS_*", "GOTO_*", "BLIS_*", "NUMEXPR_*"),
    *("TORCH*", "PYTORCH_*", "TRITON_CACHE_DIR", "TOKENIZERS_*", "RAYON_*", "CC", "CXX", "CPATH", "LIBRARY_PATH"),
)
#: For Python with this project and its libraries.
PYTHON = ("PYTHON*", "MPLCONFIGDIR")
#: For transformers and huggingface_hub: the places of their caches, and whether they may use the network.
HUGGING_FACE = ("HF_*", "HUGGINGFACE_*", "TRANSFORMERS_*")
#: For programs that ask servers elsewhere.
NETWORK = (
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE"),
)
#: For MLflow's client and server. The drivers of its databases read variables of their own.
MLFLOW = ("MLFLOW_*",)
DATABASE = ("PG*", "MYSQL_*")
#: For the object storage of clouds: keys and their places.
CLOUD = ("AWS_*", "BOTO_*", "GOOGLE_*", "GCLOUD_*", "CLOUDSDK_*", "AZURE_*")
#: For pip.
PIP = ("PIP_*", "NETRC")

#: Names of variables that hold a secret although a pattern above matches them, such as HF_TOKEN and NVIDIA_API_KEY.
_SECRET = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASS|CREDENTIAL|LOGIN|AUTH(?!OR)")


def inherited(*needs: Sequence[str], secrets: Sequence[str] = (), **more: str) -> dict[str, str]:
    """Return the environment of a process that has these needs.

    Args:
        needs: Names, or beginnings of names with a star, such as PROGRAM and COMPUTE.
        secrets: Names of the same form, for variables that the process needs although they hold a password.
        more: Further variables.
    """
    wanted, allowed = _pattern([name for need in needs for name in need]), _pattern(secrets)
    return {
        **{
            name: value
            for name, value in os.environ.items()
            if allowed.fullmatch(name)
            or (wanted.fullmatch(name) and not _SECRET.search(name.upper()) and not _has_login(value, name))
        },
        **more,
    }


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names) or r"(?!)")


def _has_login(value: str, name: str) -> bool:
    """Return whether the value is an address with a password that the process does not need.

    The addresses of proxies and of package indexes need theirs.
    """
    needed = name.upper().endswith("_PROXY") or name.startswith("PIP_")
    return not needed and bool(re.search(r"://[^/\s]*@", value))
