//! The common path takes no memory: decoding a frame and restoring an ordered stream of whole messages.

use allocation_counter::measure;
use atp_proto::codec::{decode_body, decode_envelope, encode, encode_body};
use atp_proto::reassembly::{Fed, Inbound};
use atp_proto::{Flags, Frame};
use bytes::{Bytes, BytesMut};

fn frame(msg_seq: u64) -> Frame {
    Frame::raw(
        "c-00112233445566778899",
        msg_seq,
        Flags::NONE,
        "agent.result.partial",
        Bytes::from_static(b"{\"text\":\"x\"}"),
    )
}

#[test]
fn a_common_frame_is_decoded_without_an_allocation() {
    let body = encode_body(&frame(7));
    let _shared = body.clone(); // A buffer that was read from a socket is shared already.
    let info = measure(|| assert_eq!(decode_body(body.clone()).map(|f| f.msg_seq), Ok(7)));
    assert_eq!(info.count_total, 0, "{info:?}");
    let mut out = BytesMut::new();
    encode(&frame(7), &mut out);
    let envelope = out.split_off(4).freeze();
    let _shared = envelope.clone();
    let info = measure(|| assert_eq!(decode_envelope(envelope.clone()).map(|r| r.frame.msg_seq), Ok(7)));
    assert_eq!(info.count_total, 0, "{info:?}");
}

#[test]
fn a_whole_message_in_order_passes_without_an_allocation() {
    let mut inbound = Inbound::after(6);
    let mut received = Some(atp_proto::codec::Received::from_frame(frame(7)));
    let info = measure(|| {
        let fed = inbound.feed(received.take().unwrap()).unwrap();
        assert!(matches!(fed, Fed::Ready(message) if message.bodies.as_slice().len() == 1));
        assert!(inbound.next_ready().is_none());
    });
    assert_eq!(info.count_total, 0, "{info:?}");
    assert!(size_of::<Inbound>() <= 16);
}

#[test]
fn an_encoder_with_room_takes_none() {
    let mut out = BytesMut::with_capacity(1024);
    let frame = frame(7);
    let info = measure(|| encode(&frame, &mut out));
    assert_eq!(info.count_total, 0, "{info:?}");
}
