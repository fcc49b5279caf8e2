# Recipes for people; each is one command that also works without `just`.

# What has to pass before every commit
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo test --workspace
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# Everything, as CI does it (`just test --all`)
test *ARGS:
    ops/test.sh {{ARGS}}

# Schedules of the simulation: `just sim --schedules 20000`, or one again: `just sim --seed 17`
sim *ARGS:
    cargo run --profile sim -p atp-tests --no-default-features --bin sim -- {{ARGS}}

# Every row of tests/cluster/FAULTS.md, or those that hold a text: `just faults Clock`
faults *ARGS:
    ops/faults.sh {{ARGS}}

# Three routers at 30 streams a second lose a router, a lease, Redis and a broker; the pauses that clients saw are printed
fleet:
    ATP_TEST_ALL=1 cargo test --release -p atp-tests --test fleet three_routers -- --nocapture

# Every planted fault must be caught
mutants *ARGS:
    tests/simulation/mutants/run.sh {{ARGS}}

# A router killed before each of its writes, syncs and sends: a sample, `just sweep --all`, or one again
sweep *ARGS:
    cargo run --quiet -p atp-tests --bin sweep -- {{ARGS}}

# The Helm chart, rendered and checked
chart:
    ops/test.sh helm

fmt:
    cargo fmt --all

# One real task from submit to bill (`just demo --local-llm`)
demo *ARGS:
    cargo run --release -- demo {{ARGS}}

docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --open

bench *ARGS:
    cargo run --release -- bench {{ARGS}}

# Advisories, where the network allows
audit:
    cargo deny check advisories
