//! Compiles `proto/atp.proto` with a compiler that Cargo fetches, so that no `protoc` has to be installed.

/// The messages that stand in the JSON view under the names that they have here.
const IN_JSON: [&str; 5] = [".atp.v1.Meta", ".atp.v1.Window", ".atp.v1.Amount", ".atp.v1.Cost", ".atp.v1.ToolCost"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/atp.proto");
    let files = protox::compile(["proto/atp.proto"], ["proto"])?;
    let mut config = prost_build::Config::new();
    config.bytes(["."]);
    for message in IN_JSON {
        config.type_attribute(message, "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]");
        let field = "#[serde(deserialize_with = \"crate::lenient::lenient\", skip_serializing_if = \"crate::lenient::is_default\")]";
        config.field_attribute(message, field);
    }
    config.compile_fds(files)?;
    Ok(())
}
