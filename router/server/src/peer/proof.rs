//! How two routers prove to each other that they hold the same key, without saying it: each answers the other's nonce.
//!
//! ```text
//! dialling                                     answering
//!   SYN control.hello {router, nonce, tenant?} ->
//!                              <- peer.challenge {router, nonce, proof}
//!   peer.proof {proof} ->
//!                              <- SYN|ACK control.hello
//! ```
//!
//! A proof covers both nonces, both names, what the connection is for and whose proof it is: none can be replayed, sent back or
//! used for another connection.

use atp_proto::content::{PeerChallenge, PeerHello, PeerProof};
use atp_proto::id::is_id;
use atp_proto::{Code, TenantId, WireError};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::fmt;
use std::sync::Arc;

/// Bytes that a key has at least.
pub(crate) const KEY_BYTES_MIN: usize = 32;
/// Hex digits of a nonce.
const NONCE_DIGITS: usize = 64;

/// The key that the routers of one log share, and while it is changed a second one that is taken too. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerKey {
    own: Arc<[u8]>,
    also: Option<Arc<[u8]>>,
}

impl fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerKey(..)")
    }
}

/// Who proves.
#[derive(Clone, Copy)]
enum Side {
    Dials,
    Answers,
}

impl PeerKey {
    /// `None`: it is shorter than 32 bytes.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        (text.len() >= KEY_BYTES_MIN).then(|| Self { own: text.as_bytes().into(), also: None })
    }

    /// Who has that one is believed too.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self { also: Some(other.own.clone()), ..self }
    }

    fn mac(key: &[u8], side: Side, hello: &PeerHello, answers: (&str, &str)) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
        let whose = match side {
            Side::Dials => "dials",
            Side::Answers => "answers",
        };
        let (purpose, tenant) = match &hello.tenant {
            Some(tenant) => ("client", tenant.as_str()),
            None => ("link", ""),
        };
        // Each with its length, so that no two lists read the same.
        for part in ["atp peer 1", whose, &hello.router, &hello.nonce, answers.0, answers.1, purpose, tenant] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part.as_bytes());
        }
        mac
    }

    fn prove(&self, side: Side, hello: &PeerHello, answers: (&str, &str)) -> String {
        atp_core::record::hex(&Self::mac(&self.own, side, hello, answers).finalize().into_bytes())
    }

    /// The one key that this proof shows, in constant time for each.
    fn proved(&self, side: Side, hello: &PeerHello, answers: (&str, &str), proof: &str) -> Option<Self> {
        let bytes: Vec<u8> = proof.as_bytes().chunks(2).map(hex_byte).collect::<Option<_>>()?;
        let shows = |key: &&Arc<[u8]>| Self::mac(key, side, hello, answers).verify_slice(&bytes).is_ok();
        let own = [&self.own].into_iter().chain(&self.also).find(shows)?.clone();
        Some(Self { own, also: None })
    }
}

fn hex_byte(pair: &[u8]) -> Option<u8> {
    let digit = |d: u8| (d as char).to_digit(16);
    let &[high, low] = pair else { return None };
    u8::try_from(digit(high)? << 4 | digit(low)?).ok()
}

/// Random, for one connection.
pub(crate) fn nonce() -> String {
    let half = || uuid::Uuid::new_v4().simple().to_string();
    half() + &half()
}

fn refused(message: &str) -> WireError {
    WireError::new(Code::Auth, message)
}

/// The dialling side, from its hello on.
pub(crate) struct Dialling {
    key: PeerKey,
    hello: PeerHello,
    /// Who must answer.
    expected: String,
}

impl Dialling {
    pub(crate) fn new(key: PeerKey, own: &str, expected: &str, tenant: Option<TenantId>) -> Self {
        let role = atp_proto::content::Role::Router;
        let hello = PeerHello { minor_max: 1, role, router: own.into(), nonce: nonce(), tenant };
        Self { key, hello, expected: expected.into() }
    }

    pub(crate) fn hello(&self) -> &PeerHello {
        &self.hello
    }

    /// Checks the other side's proof and gives its own.
    ///
    /// # Errors
    /// EAUTH: another router answered, or one without the key.
    pub(crate) fn answer(&self, challenge: &PeerChallenge) -> Result<PeerProof, WireError> {
        let answers = (&*challenge.router, &*challenge.nonce);
        if challenge.router != self.expected {
            return Err(refused("peer.challenge: another router answers at this address"));
        }
        // Under the key that both have.
        match self.key.proved(Side::Answers, &self.hello, answers, &challenge.proof) {
            Some(key) => Ok(PeerProof { proof: key.prove(Side::Dials, &self.hello, answers) }),
            None => Err(refused("peer.challenge: the router that answers has another peers.key")),
        }
    }
}

/// The answering side, once it has said its challenge.
pub(crate) struct Answering {
    key: PeerKey,
    hello: PeerHello,
    own: String,
    nonce: String,
}

impl Answering {
    /// # Errors
    /// EAUTH: the hello says nothing that could be proved.
    pub(crate) fn new(key: &PeerKey, own: &str, hello: PeerHello) -> Result<(Self, PeerChallenge), WireError> {
        let key = key.clone();
        if !is_id(&hello.router) || hello.router == own {
            return Err(refused("router: must be another router's id; each router has its own router.id"));
        }
        if hello.nonce.len() != NONCE_DIGITS || !hello.nonce.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(refused("nonce: 64 hex digits, new for each connection"));
        }
        let nonce = nonce();
        let proof = key.prove(Side::Answers, &hello, (own, &nonce));
        let challenge = PeerChallenge { router: own.into(), nonce: nonce.clone(), proof };
        Ok((Self { key, hello, own: own.into(), nonce }, challenge))
    }

    /// Who has dialled, once it has proved it.
    ///
    /// # Errors
    /// EAUTH.
    pub(crate) fn accept(self, proof: &PeerProof) -> Result<PeerHello, WireError> {
        match self.key.proved(Side::Dials, &self.hello, (&self.own, &self.nonce), &proof.proof) {
            Some(_) => Ok(self.hello),
            None => Err(refused("peer.proof: the router that dialled has another peers.key")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef0123456789abcdef";

    fn key() -> PeerKey {
        PeerKey::new(KEY).unwrap()
    }

    fn dial(tenant: Option<&str>) -> Dialling {
        Dialling::new(key(), "r1", "r2", tenant.map(TenantId::new))
    }

    fn challenged(dialling: &Dialling) -> (Answering, PeerChallenge) {
        Answering::new(&key(), "r2", dialling.hello().clone()).unwrap()
    }

    fn is_auth<T>(refused: Result<T, WireError>) -> bool {
        refused.err().is_some_and(|e| e.code == Code::Auth)
    }

    #[test]
    fn atp_13_2_the_same_key_is_proved_both_ways() {
        for tenant in [None, Some("acme")] {
            let dialling = dial(tenant);
            let (answering, challenge) = challenged(&dialling);
            let accepted = answering.accept(&dialling.answer(&challenge).unwrap()).unwrap();
            assert_eq!(accepted, *dialling.hello());
        }
    }

    #[test]
    fn atp_13_2_another_key_is_refused_by_both() {
        let other = PeerKey::new(&KEY.replace('0', "1")).unwrap();
        let dialling = Dialling::new(other.clone(), "r1", "r2", None);
        let (answering, challenge) = challenged(&dialling);
        assert!(is_auth(dialling.answer(&challenge)));
        let forged = other.prove(Side::Dials, dialling.hello(), ("r2", &challenge.nonce));
        assert!(is_auth(answering.accept(&PeerProof { proof: forged })));
    }

    #[test]
    fn atp_13_2_a_proof_is_of_one_connection() {
        let (first, second) = (dial(None), dial(None));
        let (answering, challenge) = challenged(&first);
        let proof = first.answer(&challenge).unwrap();
        assert!(answering.accept(&proof).is_ok());
        // Replayed: the same hello and proof meet a new nonce.
        let (again, new) = challenged(&first);
        assert_ne!(new.nonce, challenge.nonce);
        assert!(is_auth(again.accept(&proof)));
        // A recorded challenge answers no other hello.
        assert!(is_auth(second.answer(&challenge)));
    }

    #[test]
    fn atp_13_2_a_proof_that_comes_back_proves_nothing() {
        let dialling = dial(None);
        let (answering, challenge) = challenged(&dialling);
        assert!(is_auth(answering.accept(&PeerProof { proof: challenge.proof.clone() })));
        // Nor does a router take its own name, or a name that it didn't dial.
        let own = PeerHello { router: "r2".into(), ..dialling.hello().clone() };
        assert!(is_auth(Answering::new(&key(), "r2", own)));
        let (_, elsewhere) = Answering::new(&key(), "r3", dialling.hello().clone()).unwrap();
        assert!(is_auth(dialling.answer(&elsewhere)));
    }

    #[test]
    fn atp_13_2_what_the_connection_is_for_is_part_of_the_proof() {
        let dialling = dial(Some("acme"));
        let (_, challenge) = challenged(&dialling);
        let proof = dialling.answer(&challenge).unwrap();
        for tenant in [None, Some("other")] {
            let hello = PeerHello { tenant: tenant.map(TenantId::new), ..dialling.hello().clone() };
            let own = (String::from("r2"), challenge.nonce.clone());
            let answering = Answering { key: key(), hello, own: own.0, nonce: own.1 };
            assert!(is_auth(answering.accept(&proof)));
        }
    }

    #[test]
    fn atp_13_2_a_bad_nonce_or_proof_is_refused() {
        let hello = dial(None).hello().clone();
        for nonce in ["", "zz", &"0".repeat(63), &"g".repeat(64)] {
            assert!(is_auth(Answering::new(&key(), "r2", PeerHello { nonce: nonce.into(), ..hello.clone() })));
        }
        for proof in ["", "0", "zz", &"00".repeat(32)] {
            let (answering, _) = challenged(&dial(None));
            assert!(is_auth(answering.accept(&PeerProof { proof: proof.into() })), "{proof}");
        }
    }

    #[test]
    fn atp_13_2_while_the_key_is_changed_routers_with_the_old_and_the_new_one_believe_each_other() {
        let (old, new) = (key(), PeerKey::new(&KEY.replace('0', "1")).unwrap());
        let (begun, changed) = (old.clone().or(&new), new.clone().or(&old));
        let agree = |dials: &PeerKey, answers: &PeerKey| {
            let dialling = Dialling::new(dials.clone(), "r1", "r2", None);
            let (answering, challenge) = Answering::new(answers, "r2", dialling.hello().clone()).unwrap();
            dialling.answer(&challenge).and_then(|proof| answering.accept(&proof)).is_ok()
        };
        // Each step of the change, with the one before and the one behind.
        for (one, other) in
            [(&old, &begun), (&begun, &begun), (&begun, &changed), (&changed, &changed), (&changed, &new)]
        {
            assert!(agree(one, other) && agree(other, one));
        }
        // A step left out parts them.
        assert!(!agree(&old, &new) && !agree(&new, &old));
        assert!(!agree(&old, &changed) && !agree(&new, &begun));
    }

    #[test]
    fn a_key_is_at_least_32_bytes_and_never_shown() {
        assert!(PeerKey::new(&KEY[1..]).is_none());
        assert!(!format!("{:?}", key()).contains("0123"));
    }
}
