//! `fs.read`: one regular file below a root. No component of a path leads out of it, whatever links stand there and whoever
//! moves them meanwhile: the kernel walks, and what it opened is what is read.

use super::{content, too_large};
use atp_proto::{Code, WireError};
use rustix::fs::{Mode, OFlags, fstat};
use rustix::io::Errno;
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Bytes of a path.
const PATH_MAX: usize = 4095;
/// A walk that a rename disturbed is begun again so often.
const TRIES: usize = 16;

/// Without O_NONBLOCK a FIFO would hold the thread until somebody writes.
const FLAGS: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// Reads `path` below `root`, at most `max` bytes.
///
/// # Errors
/// EPROTO: no such file, or no path. ESEC: it leads out of the root, or is no regular file. ELIMIT: it is longer.
pub(super) fn read(root: &Path, path: &str, max: usize) -> Result<Value, WireError> {
    check(path)?;
    let dir = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| WireError::new(Code::AgentDown, format!("tools.fs_read.root can't be opened: {e}")))?;
    let file = open(&dir, path).map_err(|e| explain(path, e))?;
    let status = fstat(&file).map_err(|e| explain(path, e))?;
    if !rustix::fs::FileType::from_raw_mode(status.st_mode).is_file() {
        return Err(sec(path, "is no regular file"));
    }
    let mut bytes = Vec::new();
    let most = max as u64 + 1;
    File::from(file)
        .take(most)
        .read_to_end(&mut bytes)
        .map_err(|e| WireError::new(Code::AgentDown, format!("args.path: `{}` can't be read: {e}", cut(path))))?;
    if bytes.len() > max {
        let length = u64::try_from(status.st_size).unwrap_or(most).max(most);
        return Err(too_large(length, max));
    }
    Ok(content(bytes))
}

fn check(path: &str) -> Result<(), WireError> {
    if path.is_empty() || path.len() > PATH_MAX || path.contains('\0') {
        return Err(WireError::proto(format!("args.path: 1 to {PATH_MAX} bytes without NUL")));
    }
    if path.starts_with('/') {
        return Err(sec(path, "is absolute; paths begin at the root that the operator named"));
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn open(dir: &OwnedFd, path: &str) -> Result<OwnedFd, Errno> {
    use rustix::fs::ResolveFlags;
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..TRIES {
        match rustix::fs::openat2(dir, path, FLAGS, Mode::empty(), stay) {
            // A rename meanwhile; the kernel can't tell whether it stayed below.
            Err(Errno::AGAIN) => {}
            // Older kernels and some sandboxes have no such call.
            Err(Errno::NOSYS | Errno::PERM) => return walk(dir, path),
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

#[cfg(not(target_os = "linux"))]
fn open(dir: &OwnedFd, path: &str) -> Result<OwnedFd, Errno> {
    walk(dir, path)
}

/// One component at a time, through no link and to no parent.
fn walk(dir: &OwnedFd, path: &str) -> Result<OwnedFd, Errno> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    if parts.contains(&"..") {
        return Err(Errno::XDEV);
    }
    let Some((last, above)) = parts.split_last() else { return Err(Errno::ISDIR) };
    let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = dir.try_clone().map_err(|_| Errno::MFILE)?;
    for part in above {
        at = rustix::fs::openat(&at, *part, step, Mode::empty())?;
    }
    rustix::fs::openat(&at, *last, FLAGS | OFlags::NOFOLLOW, Mode::empty())
}

fn explain(path: &str, error: Errno) -> WireError {
    match error {
        Errno::XDEV | Errno::LOOP => sec(path, "leads out of the root"),
        Errno::NOENT | Errno::NOTDIR => WireError::proto(format!("args.path: no file `{}`", cut(path))),
        Errno::NAMETOOLONG => WireError::proto("args.path: a name in it is too long"),
        // A socket; a directory opens and is told apart later.
        Errno::NXIO | Errno::ISDIR => sec(path, "is no regular file"),
        Errno::ACCESS => sec(path, "can't be read by the router's user"),
        _ => WireError::new(Code::AgentDown, format!("args.path: `{}` can't be opened: {error}", cut(path))),
    }
}

fn sec(path: &str, why: &str) -> WireError {
    WireError::new(Code::Sec, format!("args.path: `{}` {why}", cut(path)))
}

fn cut(path: &str) -> &str {
    let end = (0..=path.len().min(200)).rev().find(|i| path.is_char_boundary(*i)).unwrap_or(0);
    &path[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    struct House {
        _dir: tempfile::TempDir,
        root: std::path::PathBuf,
    }

    /// A secret beside a root that has a file, a directory and links of every kind.
    fn house() -> House {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("sub/deep")).unwrap();
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        std::fs::write(root.join("a"), "inside").unwrap();
        std::fs::write(root.join("sub/b"), "inside").unwrap();
        symlink("../secret", root.join("up")).unwrap();
        symlink("../..", root.join("sub/out")).unwrap();
        symlink(dir.path().join("secret"), root.join("abs")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("sub/b", root.join("stays")).unwrap();
        House { _dir: dir, root }
    }

    fn by_walk(root: &Path, path: &str) -> Result<(), Errno> {
        let dir = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        walk(&dir, path).map(|_| ())
    }

    #[test]
    fn what_lies_below_is_read() {
        let house = house();
        for path in ["a", "sub/b", "./a", "sub//b", "stays", "sub/../a"] {
            assert_eq!(read(&house.root, path, 100).unwrap()["text"], "inside", "{path}");
        }
    }

    #[test]
    fn nothing_leads_out() {
        let house = house();
        let out = [
            "../secret",
            "up",
            "abs",
            "/etc/passwd",
            "sub/out/secret",
            "sub/../../secret",
            "..",
            "magic/etc/passwd",
            "loop",
        ];
        for path in out {
            let error = read(&house.root, path, 100).unwrap_err();
            assert_eq!(error.code, Code::Sec, "{path}: {error}");
            assert!(path.starts_with('/') || by_walk(&house.root, path).is_err(), "{path}");
        }
        for path in ["", "a\0b", &"x".repeat(PATH_MAX + 1), &"y".repeat(256), "nothing", "a/b"] {
            assert_eq!(read(&house.root, path, 100).unwrap_err().code, Code::Proto, "{path:?}");
        }
        assert!(by_walk(&house.root, "sub/b").is_ok() && by_walk(&house.root, "stays").is_err());
    }

    #[test]
    fn only_regular_files_and_no_waiting_for_others() {
        let house = house();
        rustix::fs::mknodat(rustix::fs::CWD, house.root.join("fifo"), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
            .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(house.root.join("sock")).unwrap();
        for path in ["fifo", "sock", "sub", "."] {
            assert_eq!(read(&house.root, path, 100).unwrap_err().code, Code::Sec, "{path}");
        }
    }

    #[test]
    fn n_bytes_are_read_and_one_more_is_refused() {
        let house = house();
        assert_eq!(read(&house.root, "a", 6).unwrap()["bytes"], 6);
        let error = read(&house.root, "a", 5).unwrap_err();
        assert_eq!((error.code, error.used, error.limit), (Code::Limit, Some(6), Some(5)));
    }

    /// A link that is swapped all the time between a directory inside and one outside.
    #[test]
    fn a_link_that_is_swapped_meanwhile_never_shows_the_outside() {
        let house = house();
        std::fs::create_dir(house.root.join("../outside")).unwrap();
        std::fs::write(house.root.join("../outside/b"), "secret").unwrap();
        let (root, stop) = (house.root.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let swap = std::thread::spawn({
            let stop = stop.clone();
            move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for to in ["sub", "../outside"] {
                        let fresh = root.join("fresh");
                        symlink(to, &fresh).unwrap();
                        std::fs::rename(&fresh, root.join("swapped")).unwrap();
                    }
                }
            }
        });
        for _ in 0..3_000 {
            if let Ok(data) = read(&house.root, "swapped/b", 100) {
                assert_eq!(data["text"], "inside");
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        swap.join().unwrap();
    }

    proptest! {
        #[test]
        fn no_path_shows_the_secret(parts in proptest::collection::vec(
            prop_oneof![Just(".."), Just("."), Just(""), Just("sub"), Just("out"), Just("up"), Just("deep"), Just("secret"),
                        Just("a"), Just("b"), Just("abs"), Just("magic"), Just("root")], 1..8)) {
            let house = house();
            if let Ok(data) = read(&house.root, &parts.join("/"), 100) {
                prop_assert_eq!(&data["text"], "inside");
            }
        }
    }
}
