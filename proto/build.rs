//! Compiles `proto/atp.proto` with a compiler that Cargo fetches, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/atp.proto");
    let files = protox::compile(["proto/atp.proto"], ["proto"])?;
    prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    Ok(())
}
