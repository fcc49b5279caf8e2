//! Writes `tests/vectors/*.json`: frames, refusals, fragments, codes and ids that an implementation in any language can be
//! checked against. `cargo run -p atp-proto --example vectors` rewrites them; a test compares them with what is written here.

#[path = "../tests/vectors/cases.rs"]
mod cases;

fn main() -> std::io::Result<()> {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors");
    std::fs::create_dir_all(&dir)?;
    for (name, content) in cases::files() {
        std::fs::write(dir.join(name), content)?;
    }
    Ok(())
}
