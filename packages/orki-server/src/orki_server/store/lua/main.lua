-- Applies the operations in their order. One that fails leaves the others alone and answers {'error', why}.

local replies, at = {}, 1
while at <= #ARGV do
  local count, arguments = tonumber(ARGV[at + 1]), {}
  for offset = 1, count do arguments[offset] = ARGV[at + 1 + offset] end
  local fine, reply = pcall(OPS[ARGV[at]], arguments)
  if not fine then reply = { 'error', type(reply) == 'table' and (reply.err or 'unknown') or tostring(reply) } end
  replies[#replies + 1] = reply
  at = at + 2 + count
end
return replies
