# make demo: text from the embedded model. make test: every test. make lint. make fuzz MINUTES=30: damaged files.
# Each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint fuzz setup
setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/ready
	$(VENV)/python generate.py --prompt "ROMEO:" --max_new_tokens 200 --seed 1

# The kernels run on a GPU where there is one, and in Triton's interpreter where there is none: a pass of their own. Each pass has
# two processes of a thread each: compilers and the interpreter take one core. A file stays in one of them, where what it loads and
# compiles is shared.
test: export OMP_NUM_THREADS = 1
test: .venv/ready
	$(VENV)/python -m pytest tests --ignore tests/kernels -n 2 --dist loadfile
	export TRITON_INTERPRET=$$($(VENV)/python -c "import torch; print(int(not torch.cuda.is_available()))"); \
	$(VENV)/python -m pytest tests/kernels -n 2

lint: .venv/ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

fuzz: .venv/ready
	nice -n 19 $(VENV)/python tests/fuzz.py --minutes $(or $(MINUTES),10)
