//! What the demo reviews: a crate's directory and its source text, or one file. Reads, never writes.

use crate::failure::Failure;
use crate::submit::{content_type, read_text};
use atp_proto::content::InputText;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Source text that goes to language models: a small local one takes no more in its context.
const INPUT_BYTES_MAX: usize = 8 * 1024;

#[derive(Debug)]
pub(crate) struct Source {
    /// For people.
    pub(crate) what: String,
    pub(crate) inputs: Vec<InputText>,
    /// The crate that tools run in; none for a text.
    pub(crate) tools: Option<PathBuf>,
    pub(crate) is_default: bool,
    /// A stranger's workspace may have to be built first.
    pub(crate) deadline: Duration,
}

/// The file, the directory, or the small crate that comes with the project.
pub(crate) fn find(path: Option<&Path>, file: Option<&Path>) -> Result<Source, Failure> {
    if let Some(file) = file {
        let mut text = read_text("--file", file)?;
        cut(&mut text, INPUT_BYTES_MAX);
        let input = InputText { name: file.display().to_string(), content_type: content_type(file).into(), text };
        let what = file.display().to_string();
        let deadline = Duration::from_secs(110);
        return Ok(Source { what, inputs: vec![input], tools: None, is_default: false, deadline });
    }
    let (directory, is_default, deadline) = match path {
        Some(path) => (path.to_owned(), false, Duration::from_secs(600)),
        None => (own_crate()?, true, Duration::from_secs(110)),
    };
    if !directory.join("Cargo.toml").is_file() {
        return Err(Failure::usage(format!(
            "--path: {} has no Cargo.toml; name a Rust workspace",
            directory.display()
        )));
    }
    let directory =
        directory.canonicalize().map_err(|e| Failure::usage(format!("--path: {}: {e}", directory.display())))?;
    let inputs = inputs(&directory)?;
    let bytes: usize = inputs.iter().map(|i| i.text.len()).sum();
    let what = format!("{}: {} source files, {bytes} bytes for models", directory.display(), inputs.len());
    Ok(Source { what, inputs, tools: Some(directory), is_default, deadline })
}

/// `ops/demo` of the checkout that this program was built in, or of the current directory.
fn own_crate() -> Result<PathBuf, Failure> {
    let places = [Path::new(env!("CARGO_MANIFEST_DIR")).join("demo"), PathBuf::from("ops/demo")];
    let found = places.iter().find(|p| p.join("Cargo.toml").is_file()).cloned();
    found.ok_or_else(|| {
        Failure::usage("the demo's crate ops/demo isn't here: run in a checkout of the project, or give --path DIR")
    })
}

/// Rust sources in order of path, as many as fit.
fn inputs(directory: &Path) -> Result<Vec<InputText>, Failure> {
    let mut files = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&next) else { continue };
        for path in entries.filter_map(|e| e.ok().map(|e| e.path())) {
            let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.') || n == "target");
            if hidden || path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let (mut inputs, mut room) = (Vec::new(), INPUT_BYTES_MAX);
    for path in files {
        let mut text = read_text("--path", &path).unwrap_or_default();
        cut(&mut text, room);
        room -= text.len();
        let name = path.strip_prefix(directory).unwrap_or(&path).display().to_string();
        if !text.is_empty() {
            inputs.push(InputText { name, content_type: content_type(&path).into(), text });
        }
        if room == 0 {
            break;
        }
    }
    Ok(inputs)
}

/// At most `bytes`, at a character's bound.
fn cut(text: &mut String, bytes: usize) {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_crate_is_found_and_bounded() {
        let source = find(None, None).expect("in a checkout");
        assert!(source.is_default && !source.inputs.is_empty());
        assert!(source.inputs.iter().map(|i| i.text.len()).sum::<usize>() <= INPUT_BYTES_MAX);
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let mut text = String::from("aé");
        cut(&mut text, 2);
        assert_eq!(text, "a");
        cut(&mut text, 5);
        assert_eq!(text, "a");
    }
}
