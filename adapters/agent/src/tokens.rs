//! How many tokens a text is, without a provider's tokenizer: a count that is rather too high, because it guards grants.

/// A count that real tokenizers hardly exceed: words of up to five letters and each digit or sign are one token, longer
/// words one per five letters, other scripts two tokens per three bytes.
#[must_use]
pub(crate) fn upper(text: &str) -> u64 {
    let (mut tokens, mut letters, mut foreign_bytes, mut blanks) = (0_u64, 0_u64, 0_u64, 0_u64);
    for c in text.chars() {
        if c.is_ascii_alphabetic() {
            (letters, blanks) = (letters + 1, 0);
            continue;
        }
        tokens += letters.div_ceil(5);
        letters = 0;
        match c {
            // A single blank belongs to the word behind it; runs of them are tokens of their own.
            ' ' => {
                blanks += 1;
                tokens += u64::from(blanks % 4 == 2);
            }
            c if c.is_ascii() => (tokens, blanks) = (tokens + 1, 0),
            c => (foreign_bytes, blanks) = (foreign_bytes + c.len_utf8() as u64, 0),
        }
    }
    tokens + u64::from(blanks > 0) + letters.div_ceil(5) + (foreign_bytes * 2).div_ceil(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_not_below_what_tokenizers_say() {
        // (text, the tokens that a vocabulary of 49,000 entries makes of it)
        for (text, tokens) in [
            ("", 0),
            ("Hello, world!", 4),
            ("The quick brown fox jumps over the lazy dog.", 10),
            ("    if grams < BANDS[i].0 {\n        return Some(BANDS[i].1);\n    }\n", 27),
            ("international", 2),
            ("1234567890", 10),
        ] {
            let count = upper(text);
            assert!((tokens..=2 * tokens).contains(&count), "{text}: {count}, not {tokens} or somewhat more");
        }
        assert!(upper("日本語") >= 6 && upper("🌟") >= 3);
    }

    #[test]
    fn pieces_never_count_less_than_the_whole() {
        let text = "Review this: let x = values[10..=20].iter().sum::<u64>();  // grün";
        for cut in (0..=text.len()).filter(|n| text.is_char_boundary(*n)) {
            // A piece of output counts as one token at least.
            let piece = |part: &str| upper(part).max(u64::from(!part.is_empty()));
            assert!(piece(&text[..cut]) + piece(&text[cut..]) >= upper(text));
        }
    }
}
