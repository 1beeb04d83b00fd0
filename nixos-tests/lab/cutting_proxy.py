"""Proxy that simulates a bad network: cutting_proxy.py PORT HOST:PORT BYTES.

Cuts each connection to HOST:PORT after BYTES of responses.
Prints a line for each connection, "open", and at its end "cut 8388608" or "end 1234".
"""

import asyncio
import sys
from asyncio import StreamReader, StreamWriter


async def copy(source: StreamReader, target: StreamWriter, limit: int) -> int:
    copied = 0
    while copied < limit and (data := await source.read(min(65536, limit - copied))):
        target.write(data)
        await target.drain()
        copied += len(data)
    if copied < limit:
        target.write_eof()
    return copied


async def main(port: int, origin: str, limit: int) -> None:
    host, _, origin_port = origin.partition(":")

    async def connected(client: StreamReader, responses: StreamWriter) -> None:
        print("open", flush=True)
        server, requests = await asyncio.open_connection(host, int(origin_port))
        copying = asyncio.create_task(copy(client, requests, sys.maxsize))
        try:
            copied = await copy(server, responses, limit)
            print("cut" if copied == limit else "end", copied, flush=True)
        finally:
            copying.cancel()
            responses.transport.abort()
            requests.transport.abort()

    async with await asyncio.start_server(connected, port=port) as proxy:
        await proxy.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
